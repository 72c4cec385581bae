"""Support for tests of reasoning models."""
