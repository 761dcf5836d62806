"""Pictures and pages drawn from files of figures."""
