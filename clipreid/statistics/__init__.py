"""How sure a figure is: intervals, differences, calibration. Knows neither models nor distances' makers."""
