"""Models to try the engine on: handmade ones, torchvision, timm and transformers; and maskings for them all."""
