"""Networks that look at pictures, each from a local path or a hub repository, with its one stated resize."""
