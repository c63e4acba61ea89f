"""`hookline from-lightning`: configurations of LightningCLI."""
