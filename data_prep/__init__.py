"""Source files to array_record shards and a manifest; one script per dataset."""
