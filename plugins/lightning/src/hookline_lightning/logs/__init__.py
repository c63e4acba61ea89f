"""`self.logger` and `logger.experiment`: all trackers of the run in the words of Lightning's loggers."""
