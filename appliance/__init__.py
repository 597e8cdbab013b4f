"""The appliance: a dataset commit becomes a checked, trained, evaluated and published adapter."""

__version__ = "0.1.0"
