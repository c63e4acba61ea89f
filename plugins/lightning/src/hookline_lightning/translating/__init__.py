"""Arguments, callbacks and loggers of Lightning's trainer as options and plugins of hookline."""
