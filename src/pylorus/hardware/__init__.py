"""Accelerator, precision, threads and memory."""
