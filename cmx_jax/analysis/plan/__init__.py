"""Which deployment serves a load within its service-level objectives."""
