"""The commands, by subject. Importing a module registers its commands; qmp/commands.py lists the modules."""
