"""The inputs that have to be refused, by number; and whatever else bytes can be."""
