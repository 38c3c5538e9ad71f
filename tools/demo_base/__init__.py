"""The parts of make_demo_base.py: which pictures, the VAE, the configurations of the trainer, the measurement."""
