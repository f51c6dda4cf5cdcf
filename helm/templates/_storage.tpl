{{/* What the API's and Ray's pods need of the storage mode. */}}

{{/* Volumes of the pod. */}}
{{- define "merger.storage.volumes" -}}
{{- end -}}

{{/* Mounts of the container. */}}
{{- define "merger.storage.mounts" -}}
{{- end -}}

{{/* Variables of the container. */}}
{{- define "merger.storage.env" -}}
{{- end -}}

{{/* Sources of variables of the container, such as a Secret with an object store's credentials. */}}
{{- define "merger.storage.envFrom" -}}
{{- end -}}
