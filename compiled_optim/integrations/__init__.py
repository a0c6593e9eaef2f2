"""What frameworks need to be told. Each module imports its framework, so import the module that you use."""
