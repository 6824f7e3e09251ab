"""Random-access sources of records: arrays, catalogues, folders, lists, text."""
