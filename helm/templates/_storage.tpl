{{/*
Where models are read and results go, for the API's, the dispatcher's and Ray's pods. Each include takes the root.
Knows folders, claims and variables; knows nothing of what runs in the pods.
*/}}

{{- define "merger.storage.claim" -}}
{{- default (printf "%s-models" (include "merger.fullname" .)) .Values.storage.volume.existingClaim -}}
{{- end -}}

{{- define "merger.storage.cacheClaim" -}}
{{- default (printf "%s-cache" (include "merger.fullname" .)) .Values.storage.modelCache.existingClaim -}}
{{- end -}}

{{/* The shared folder, and the model cache: the same in every pod. */}}
{{- define "merger.storage.shared" -}}
{{- if eq .Values.storage.mode "volume" }}
- name: models
  persistentVolumeClaim:
    claimName: {{ include "merger.storage.claim" . }}
{{- end }}
{{- if .Values.storage.modelCache.enabled }}
- name: model-cache
  persistentVolumeClaim:
    claimName: {{ include "merger.storage.cacheClaim" . }}
{{- end }}
{{- end -}}

{{/* Volumes of the service's own pods: they read headers, so a small scratch folder is enough. */}}
{{- define "merger.storage.volumes" -}}
{{ include "merger.storage.shared" . | trim }}
- name: scratch
  emptyDir:
    sizeLimit: {{ .Values.storage.scratch.apiSize }}
{{- end -}}

{{/* Volumes of a Ray pod: (dict "root" $ "scratch" what differs from storage.scratch). */}}
{{- define "merger.storage.rayVolumes" -}}
{{- $scratch := mergeOverwrite (deepCopy .root.Values.storage.scratch) (default dict .scratch) -}}
{{ include "merger.storage.shared" .root | trim }}
- name: scratch
  {{- if eq $scratch.kind "ephemeral" }}
  ephemeral:
    volumeClaimTemplate:
      metadata:
        labels:
          {{- include "merger.selectorLabels" (dict "root" .root "component" "scratch") | nindent 10 }}
      spec:
        accessModes: [ReadWriteOnce]
        {{- with $scratch.storageClassName }}
        storageClassName: {{ . }}
        {{- end }}
        resources:
          requests:
            storage: {{ $scratch.size }}
  {{- else }}
  emptyDir:
    sizeLimit: {{ $scratch.size }}
  {{- end }}
{{- end -}}

{{/* Mounts of every container that plans or works. */}}
{{- define "merger.storage.mounts" -}}
{{- if eq .Values.storage.mode "volume" }}
- name: models
  mountPath: {{ .Values.storage.volume.mountPath }}
{{- end }}
{{- if .Values.storage.modelCache.enabled }}
- name: model-cache
  mountPath: {{ .Values.storage.modelCache.mountPath }}
{{- end }}
- name: scratch
  mountPath: {{ .Values.storage.scratch.mountPath }}
{{- end -}}

{{/* Where libraries and the engine keep what they may lose: never in the container's own file system. */}}
{{- define "merger.storage.processEnv" -}}
{{- $scratch := .Values.storage.scratch.mountPath -}}
- name: HF_HOME
  value: {{ ternary .Values.storage.modelCache.mountPath (printf "%s/huggingface" $scratch) .Values.storage.modelCache.enabled }}
- name: XDG_CACHE_HOME
  value: {{ $scratch }}/cache
- name: NUMBA_CACHE_DIR
  value: {{ $scratch }}/kernels
- name: TMPDIR
  value: {{ $scratch }}
{{- with .Values.storage.hub.endpoint }}
- name: HF_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- range $name, $value := .Values.storage.objects.env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end -}}

{{/* The service's settings that follow from the mode, and the variables of its processes. */}}
{{- define "merger.storage.env" -}}
- name: MERGER_WORKING_FOLDER
  value: {{ include "merger.storage.folder" . }}
- name: MERGER_SOURCE_ROOTS
  value: {{ include "merger.storage.roots" (dict "root" . "folders" .Values.storage.volume.sourceRoots) | quote }}
- name: MERGER_OUTPUT_ROOTS
  value: {{ include "merger.storage.roots" (dict "root" . "folders" .Values.storage.volume.outputRoots) | quote }}
- name: MERGER_SHARED_FOLDERS
  value: {{ eq .Values.storage.mode "volume" | quote }}
{{- with .Values.storage.objects.roots }}
- name: MERGER_OBJECT_ROOTS
  value: {{ join "," . | quote }}
{{- end }}
{{ include "merger.storage.processEnv" . }}
{{- end -}}

{{/* Variables from a Secret that is yours: the object stores' credentials. */}}
{{- define "merger.storage.envFrom" -}}
{{- with .Values.storage.objects.existingSecret }}
- secretRef:
    name: {{ . }}
{{- end }}
{{- end -}}

{{/* What relative paths in recipes are relative to. It is there when a process starts. */}}
{{- define "merger.storage.folder" -}}
{{- ternary .Values.storage.volume.mountPath .Values.storage.scratch.mountPath (eq .Values.storage.mode "volume") -}}
{{- end -}}

{{/*
Folders that jobs may name. Without a shared folder it is one that nothing else uses: no roots at all would mean every
folder of the pod, and the caches beside it hold what other tenants have read.
*/}}
{{- define "merger.storage.roots" -}}
{{- if eq .root.Values.storage.mode "volume" -}}
{{- join ":" (default (list .root.Values.storage.volume.mountPath) .folders) -}}
{{- else -}}
{{- printf "%s/work" .root.Values.storage.scratch.mountPath -}}
{{- end -}}
{{- end -}}

{{/* Refuses what cannot work, with what to do. */}}
{{- define "merger.storage.validate" -}}
{{- $storage := .Values.storage -}}
{{- if and (eq $storage.mode "objects") (not $storage.objects.roots) -}}
{{- fail "storage.mode is objects, but storage.objects.roots is empty: list the addresses below which jobs may read and push, such as s3://team-bucket/" -}}
{{- end -}}
{{- $places := list $storage.scratch.mountPath -}}
{{- if eq $storage.mode "volume" -}}{{- $places = append $places $storage.volume.mountPath -}}{{- end -}}
{{- if $storage.modelCache.enabled -}}{{- $places = append $places $storage.modelCache.mountPath -}}{{- end -}}
{{- if ne (len $places) (len (uniq $places)) -}}
{{- fail (printf "storage: two volumes are mounted at one path (%s): give each a mountPath of its own" (join ", " $places)) -}}
{{- end -}}
{{- range concat $storage.volume.sourceRoots $storage.volume.outputRoots -}}
{{- if not (hasPrefix (printf "%s/" $storage.volume.mountPath) (printf "%s/" .)) -}}
{{- fail (printf "storage.volume: %s does not lie below the volume's mountPath, %s" . $storage.volume.mountPath) -}}
{{- end -}}
{{- end -}}
{{- end -}}
