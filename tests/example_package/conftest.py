"""Makes pytest put this folder on the path, so that the tests run on the source as well as on an installed package."""
