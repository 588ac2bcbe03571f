"""Recipe -> stages -> artifacts with manifests; resume. The only room that knows the order of things."""
