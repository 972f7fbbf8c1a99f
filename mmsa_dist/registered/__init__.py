"""The registry for those who use it: what is there, how two models differ, which one gets an alias."""
