"""`fastbn demo` trains networks with and without batch norm on real handwritten digits."""
