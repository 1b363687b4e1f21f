"""Many runs: a base recipe, axes over its fields, engines that run the members."""
