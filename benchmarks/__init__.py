"""Measuring: harness, records, gate. Part of the checkout, not of the installed package."""
