"""From predictions to figures with their uncertainty: numpy only, so that any old run can be judged again."""
