"""Post-training of text-to-image models with spatiotemporal reward allocation."""
