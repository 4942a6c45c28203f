"""Whole federations on this machine, to be shown and measured: the demonstration, and what it is made of."""
