"""`isentrope plan`: what a fleet would do, by simulation."""
