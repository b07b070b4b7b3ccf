"""The Kafka worker: from an image-upload event to a verdict."""
