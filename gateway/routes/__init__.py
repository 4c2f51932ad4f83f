"""One file per resource: request → command, query → answer."""
