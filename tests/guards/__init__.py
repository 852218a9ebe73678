"""Removes each guard in turn and shows the test that fails without it."""
