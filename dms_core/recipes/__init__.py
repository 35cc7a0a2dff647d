"""The recipes of the library, one YAML file each; ``dms_core.recipe`` reads them."""
