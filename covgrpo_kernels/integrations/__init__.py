"""The loss within other libraries, one module each; a module imports its library, and nothing imports the module."""
