"""Models to try the engine on: handmade, torchvision, timm and transformers; and maskings for them all."""
