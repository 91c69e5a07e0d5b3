"""What a device does: read its owner's text, train, personalize, keep its own."""
