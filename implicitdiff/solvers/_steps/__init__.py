"""Steps that several solvers take: line searches, trust regions, quasi-Newton updates."""
