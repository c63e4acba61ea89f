"""Lightning's first year, behind `hookline_lightning.early`."""
