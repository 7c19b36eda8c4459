"""`fastbn demo`: networks with and without batch norm, trained on real handwritten digits."""
