"""Stage by stage training: trainer, callbacks, loggers."""
