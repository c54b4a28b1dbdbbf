"""Ahead-of-time compilation for TPU topologies, and deployment on TPU machines."""
