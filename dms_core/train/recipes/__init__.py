"""The recipes of the library, one YAML file each; ``dms_core.train.recipe`` reads them."""
