"""How good a cascade is by the pictures it was trained on, in measures that its own CLIP cannot flatter."""
