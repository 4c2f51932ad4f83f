"""The language that gateway, ingestor and projector speak. It imports none of them."""
