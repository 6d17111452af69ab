"""Tests of soli.experts."""
