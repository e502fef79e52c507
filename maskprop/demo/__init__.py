"""The demo behind `maskprop demo`: what it works on (`digits`) and what it does with it (`run`)."""
