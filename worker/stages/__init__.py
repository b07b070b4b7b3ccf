"""One file a stage of the path of an event, in the order of worker.pipeline."""
