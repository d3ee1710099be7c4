"""Advanced LoRA, built and checked: the package of the course. One module a system, each read in one sitting."""
