"""The parts that a decoder is made of. Each knows its spec and its arrays, not the model it serves in."""
