"""VideoGPT at cluster scale: raw videos become a trained video generator, in stages that survive anything."""

__version__ = "0.1.0"
