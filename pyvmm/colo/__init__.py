"""COLO: one guest on two hosts, so that it goes on when one of them dies."""
