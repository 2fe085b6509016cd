"""Chooses the deployment that serves a workload within its service-level objectives."""
