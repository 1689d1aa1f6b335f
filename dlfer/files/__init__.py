"""Opening files that others may have written: nothing in them is executed, and no size is believed."""
