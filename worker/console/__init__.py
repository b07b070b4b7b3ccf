"""The console: a page that shows the stream, explains a verdict and takes corrections. `worker run` needs none of it."""
