"""x86-64: memory layout, registers, paging, boot, and the work-arounds of odd hosts."""
