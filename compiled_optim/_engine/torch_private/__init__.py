"""Everything private of torch that the package uses; the tests say which upstream change broke."""
